"""Ask a prefill and a decode server at the same time, as a router does, and print the decode server's answer.

usage: ask.py PREFILL_URL DECODE_URL BOOTSTRAP_PORT TEXT
"""

import json
import random
import sys
import threading
import urllib.parse
import urllib.request


def post(url, body):
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def main(prefill, decode, bootstrap_port, text):
    body = {
        "text": text,
        "sampling_params": {"temperature": 0, "max_new_tokens": 16},
        # Where the prefill ranks are registered, and what both legs of this one request have in common.
        "bootstrap_host": urllib.parse.urlsplit(prefill).hostname,
        "bootstrap_port": int(bootstrap_port),
        "bootstrap_room": random.getrandbits(62),
    }
    leg = threading.Thread(target=post, args=(prefill, body), daemon=True)
    leg.start()
    print(text + post(decode, body)["text"])
    leg.join(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
