#!/bin/sh
# Start a prefill and a decode server on this machine's CPU; ask one question; stop both on Ctrl-C.
# usage: run.sh MODEL [PYTHON]   PYTHON is the interpreter that has SGLang and mooncake-plugin
set -eu
MODEL=${1:?usage: run.sh MODEL [PYTHON]}
PYTHON=${2:-python3}
HERE=$(dirname "$0")
LOGS=$(mktemp -d)
export SGLANG_USE_CPU_ENGINE=1 OMP_NUM_THREADS=1
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 130' INT TERM
echo "logs: $LOGS"

server() { # NAME PORT FLAGS...
    name=$1 port=$2
    shift 2
    "$PYTHON" -m sglang.launch_server --model-path "$MODEL" --host 127.0.0.1 --port "$port" --device cpu \
        --attention-backend torch_native --page-size 16 --mem-fraction-static 0.1 --max-total-tokens 4096 \
        --max-running-requests 8 --disaggregation-transfer-backend mooncake_pull "$@" >"$LOGS/$name.log" 2>&1 &
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
"$PYTHON" "$HERE/ask.py" http://127.0.0.1:8101 http://127.0.0.1:8102 8998 "The capital of France is"
echo "running: prefill 8101, decode 8102; stop with Ctrl-C"
wait
