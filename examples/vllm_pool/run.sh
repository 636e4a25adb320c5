#!/bin/sh
# Start etcd, a store node and two engines that pool their prefix caches; ask both the same; stop all on Ctrl-C.
# usage: run.sh MODEL [PYTHON]   PYTHON is the interpreter that has vLLM and mooncake-plugin
set -eu
MODEL=${1:?usage: run.sh MODEL [PYTHON]}
PYTHON=${2:-python3}
LOGS=$(mktemp -d)
export VLLM_HOST_IP=127.0.0.1 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 130' INT TERM
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH
echo "logs: $LOGS"

mooncake etcd >"$LOGS/etcd.log" 2>&1 &
mooncake store serve --memory 1GiB >"$LOGS/store.log" 2>&1 &
for port in 8101 8102; do
    "$PYTHON" -m vllm.entrypoints.openai.api_server --model "$MODEL" --served-model-name demo --host 127.0.0.1 \
        --port $port --max-model-len 8192 --enforce-eager --enable-prompt-tokens-details --kv-transfer-config \
        '{"kv_connector":"MooncakeKVConnector","kv_role":"kv_both","kv_load_failure_policy":"recompute"}' \
        >"$LOGS/engine-$port.log" 2>&1 &
done
for port in 8101 8102; do
    seconds=0
    until curl -sf -o /dev/null http://127.0.0.1:$port/health; do
        seconds=$((seconds + 2))
        [ $seconds -lt 400 ] || { echo "the engine is not ready; see $LOGS/engine-$port.log"; exit 1; }
        [ $((seconds % 10)) -ne 0 ] || echo "  $seconds s: waiting for the engine on $port"
        sleep 2
    done
done
TEXT=$(seq -s ', ' 1 300)
for port in 8101 8102; do
    curl -s http://127.0.0.1:$port/v1/completions -H 'Content-Type: application/json' \
        -d "{\"model\": \"demo\", \"prompt\": \"$TEXT\", \"max_tokens\": 8, \"temperature\": 0}" |
        "$PYTHON" -c 'import json, sys; u = json.load(sys.stdin)["usage"]; d = u.get("prompt_tokens_details") or {}
print("port '$port':", u["prompt_tokens"], "prompt tokens,", d.get("cached_tokens") or 0, "of them not computed")'
    sleep 2
done
echo "both engines keep running (8101, 8102); stop with Ctrl-C"
wait
