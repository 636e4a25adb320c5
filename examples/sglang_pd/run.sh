#!/bin/sh
# Start a prefill and a decode server on this machine's CPU, and the router; ask one question; stop all on Ctrl-C.
# usage: run.sh MODEL [PYTHON]   PYTHON is the interpreter that has SGLang and mooncake-plugin
set -eu
MODEL=${1:?usage: run.sh MODEL [PYTHON]}
PYTHON=${2:-python3}
LOGS=$(mktemp -d)
export SGLANG_USE_CPU_ENGINE=1 SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX=false OMP_NUM_THREADS=1
# the folder of the interpreter has the mooncake command
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 130' INT TERM
echo "logs: $LOGS"

server() { # NAME PORT FLAGS...
    name=$1 port=$2
    shift 2
    "$PYTHON" -m sglang.launch_server --model-path "$MODEL" --served-model-name demo --host 127.0.0.1 \
        --port "$port" --device cpu --attention-backend torch_native --page-size 16 --mem-fraction-static 0.5 \
        --max-total-tokens 4096 --max-running-requests 8 --disaggregation-transfer-backend mooncake_pull \
        "$@" >"$LOGS/$name.log" 2>&1 &
}

wait_for() { # NAME URL
    seconds=0
    until curl -sf -o /dev/null "$2"; do
        seconds=$((seconds + 2))
        [ $seconds -lt 400 ] || { echo "$1 is not ready; see $LOGS/$1.log"; exit 1; }
        [ $((seconds % 10)) -ne 0 ] || echo "  $seconds s: waiting for $1"
        sleep 2
    done
    echo "  $1 is ready"
}

server prefill 8101 --disaggregation-mode prefill --disaggregation-bootstrap-port 8998
server decode 8102 --disaggregation-mode decode --disaggregation-decode-retraction-backup cpu_tensor
wait_for prefill http://127.0.0.1:8101/health
wait_for decode http://127.0.0.1:8102/health
mooncake router --prefill http://127.0.0.1:8101 --decode http://127.0.0.1:8102 --port 8000 >"$LOGS/router.log" 2>&1 &
wait_for router http://127.0.0.1:8000/ready
curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "demo",
    "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 24, "temperature": 0}'
echo
echo "running on http://127.0.0.1:8000; stop with Ctrl-C"
wait
