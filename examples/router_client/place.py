"""Ask the router where to run a request, then send both legs yourself: for those who have a gateway of their own.

python place.py "Once upon a time"            # needs: mooncake router ... --placement tcp://127.0.0.1:8001
"""

import json
import sys
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor

import msgspec
import zmq

from mooncake_connector.router.messages import Finished, Place, Placed, decode_answer, encode

router = zmq.Context().socket(zmq.REQ)
router.setsockopt(zmq.RCVTIMEO, 5000)
router.setsockopt(zmq.LINGER, 0)
router.connect("tcp://127.0.0.1:8001")
body = {"prompt": sys.argv[1], "max_tokens": 16, "temperature": 0}


def complete(url, params, **changes):
    data = json.dumps({**body, **changes, "kv_transfer_params": msgspec.to_builtins(params)}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=300))


router.send(encode(Place(uuid.uuid4().hex, num_prompt_tokens=len(body["prompt"]) // 4, num_output_tokens=16)))
placed = decode_answer(router.recv())
if not isinstance(placed, Placed):
    sys.exit(f"refused: {placed.reason}")
with ThreadPoolExecutor() as both_at_once:
    if placed.prefill_url:
        both_at_once.submit(complete, placed.prefill_url, placed.prefill_params, max_tokens=1)
    print(complete(placed.decode_url, placed.decode_params)["choices"][0]["text"])
router.send(encode(Finished(placed.transfer_id)))
router.recv()
