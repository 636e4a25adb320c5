#!/bin/sh
# Start etcd, a prefill engine, a decode engine and the router on this machine; ask one question; stop all on Ctrl-C.
# usage: run.sh MODEL [PYTHON]   PYTHON is the interpreter that has vLLM and mooncake-plugin
set -eu
MODEL=${1:?usage: run.sh MODEL [PYTHON]}
PYTHON=${2:-python3}
LOGS=$(mktemp -d)
export VLLM_HOST_IP=127.0.0.1 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 130' INT TERM

# the folder of the interpreter has the mooncake command
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH
echo "logs: $LOGS"

engine() { # NAME PORT ROLE
    "$PYTHON" -m vllm.entrypoints.openai.api_server --model "$MODEL" --served-model-name demo --host 127.0.0.1 \
        --port "$2" --max-model-len 8192 --enforce-eager --kv-transfer-config \
        "{\"kv_connector\":\"MooncakeKVConnector\",\"kv_role\":\"$3\",\"kv_load_failure_policy\":\"recompute\"}" \
        >"$LOGS/$1.log" 2>&1 &
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

mooncake etcd >"$LOGS/etcd.log" 2>&1 &
engine prefill 8101 kv_producer
engine decode 8102 kv_consumer
wait_for prefill http://127.0.0.1:8101/health
wait_for decode http://127.0.0.1:8102/health
mooncake router --prefill http://127.0.0.1:8101 --decode http://127.0.0.1:8102 --port 8000 >"$LOGS/router.log" 2>&1 &
wait_for router http://127.0.0.1:8000/health
curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "demo",
    "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 24, "temperature": 0}'
echo
echo "running on http://127.0.0.1:8000; stop with Ctrl-C"
wait
