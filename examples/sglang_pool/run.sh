#!/bin/sh
# Start etcd, a store node and a server with a pool on this machine's CPU; ask, start the server anew, ask again.
# usage: run.sh MODEL [PYTHON] [linker|hicache]   PYTHON is the interpreter that has SGLang and mooncake-plugin
set -eu
MODEL=${1:?usage: run.sh MODEL [PYTHON] [linker|hicache]}
PYTHON=${2:-python3}
WAY=${3:-linker}
LOGS=$(mktemp -d)
export SGLANG_USE_CPU_ENGINE=1 OMP_NUM_THREADS=1
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 130' INT TERM
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH
echo "logs: $LOGS"

case $WAY in
linker)
    set -- --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic \
        --unified-cache-external-linker-config '{"linker": "PoolLinker",
        "linker_module_path": "mooncake_connector.engines.sglang.linker",
        "linker_extra_config": {"segment_bytes": "256MiB"}}' ;;
hicache)
    set -- --enable-hierarchical-cache --hicache-size 1 --hicache-io-backend direct \
        --hicache-mem-layout page_first_direct --hicache-storage-prefetch-policy wait_complete \
        --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "mooncake",
        "module_path": "mooncake_connector.engines.sglang.hicache", "class_name": "PoolStorage", "interface_v1": 1,
        "prefetch_threshold": 16, "mooncake": {"segment_bytes": "256MiB"}}' ;;
*) echo "no such way: $WAY (linker, hicache)"; exit 2 ;;
esac

mooncake etcd >"$LOGS/etcd.log" 2>&1 &
mooncake store serve --memory 1GiB >"$LOGS/store.log" 2>&1 &
for round in 1 2; do
    "$PYTHON" -m sglang.launch_server --model-path "$MODEL" --host 127.0.0.1 --port 8101 --device cpu \
        --attention-backend torch_native --page-size 16 --mem-fraction-static 0.5 --max-total-tokens 4096 \
        --max-running-requests 8 --sleep-on-idle "$@" >"$LOGS/server-$round.log" 2>&1 &
    SERVER=$!
    seconds=0
    until curl -sf -o /dev/null http://127.0.0.1:8101/health; do
        seconds=$((seconds + 2))
        [ $seconds -lt 400 ] || { echo "the server is not ready; see $LOGS/server-$round.log"; exit 1; }
        [ $((seconds % 10)) -ne 0 ] || echo "  $seconds s: waiting for the server"
        sleep 2
    done
    curl -s http://127.0.0.1:8101/generate -H 'Content-Type: application/json' -d "{\"text\": \"$(seq -s ', ' 1 100)\",
        \"sampling_params\": {\"temperature\": 0, \"max_new_tokens\": 8}}" |
        "$PYTHON" -c 'import json, sys; m = json.load(sys.stdin)["meta_info"]
print("life '$round':", m["prompt_tokens"], "prompt tokens,", m["cached_tokens"], "of them not computed")'
    sleep 3
    [ $round = 2 ] || { kill $SERVER; wait $SERVER || true; }
done
echo "the server keeps running (8101); stop with Ctrl-C"
wait
