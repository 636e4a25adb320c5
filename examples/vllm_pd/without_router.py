"""Hand one prompt from a prefill to a decode engine without a router; standard library only.

usage: without_router.py PREFILL_URL DECODE_URL MODEL_NAME PROMPT
"""

import json
import sys
import threading
import urllib.request
import uuid


def complete(url, **body):
    """Post one completion and return the parsed answer."""
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def main():
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    prefill_url, decode_url, model, prompt = sys.argv[1:]

    # Where do the prefill engine's workers answer? Ask once per life of the engine.
    me = complete(prefill_url, model=model, prompt="x", max_tokens=1, kv_transfer_params={"introduce": True})
    peer = {key: me["kv_transfer_params"][key] for key in ("remote_engine_id", "remote_addresses")}

    # Both legs at once, under one name. The prefill leg generates one token that nobody needs.
    transfer_id = uuid.uuid4().hex
    prefill = threading.Thread(target=complete, args=(prefill_url,), kwargs={
        "model": model, "prompt": prompt, "max_tokens": 1,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}})
    prefill.start()
    answer = complete(decode_url, model=model, prompt=prompt, max_tokens=32, kv_transfer_params={
        "do_remote_prefill": True, "do_remote_decode": False, "transfer_id": transfer_id, **peer})
    prefill.join()
    print(answer["choices"][0]["text"])


if __name__ == "__main__":
    main()
