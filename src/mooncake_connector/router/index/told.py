"""Say how much of a prompt every engine holds: what it tells itself, where it does; what was placed on it, where not.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from mooncake_connector.router.index.holdings import Holdings
from mooncake_connector.router.index.lookup import Prompt
from mooncake_connector.router.messages import TOKEN_BYTES, Place

PROMPTS_MAX = 1024


class Told:
    """Corrects what is believed of engines by what they tell.

    Args:
        holdings: what they tell; fed by somebody else.
    """

    def __init__(self, holdings: Holdings) -> None:
        self.holdings = holdings
        # A request is looked at each time that an engine might take it; it is hashed once.
        self._prompts: OrderedDict[str, tuple[tuple[bytes, str, str], Prompt]] = OrderedDict()

    @property
    def is_used(self) -> bool:
        """Tell whether any engine is followed, so that a prompt's tokens are worth reading."""
        return bool(self.holdings.sources())

    def correct(self, place: Place, believed: Mapping[str, int]) -> Mapping[str, int]:
        """Return for each engine how many leading tokens of a prompt it holds; those that hold none may be missing.

        An engine that is followed without a gap is taken at its word. One that is stale may hold what it did not tell,
        so the more of both counts. Without token ids nothing is known but what is believed.

        Args:
            place: the request.
            believed: leading tokens by engine, from what was placed on them.
        """
        if not place.token_ids:
            return believed
        told = self.holdings.told
        held = {url: count for url, count in believed.items() if url not in told}
        for url, each in self.holdings.match(self._prompt(place)).engines.items():
            held[url] = max(each.local, held.get(url, 0))
        return held

    def forget(self, url: str) -> None:
        """An engine is a new process: its caches are empty."""
        self.holdings.on_renewed(url)

    def _prompt(self, place: Place) -> Prompt:
        known = self._prompts.get(place.request_id)
        asked = place.token_ids, place.model, place.cache_salt
        if known is not None and known[0] == asked:
            return known[1]
        tokens = np.frombuffer(place.token_ids, np.dtype("<u4"), len(place.token_ids) // TOKEN_BYTES)
        prompt = self.holdings.prompt(tokens, model=place.model, salt=place.cache_salt)
        self._prompts[place.request_id] = asked, prompt
        if len(self._prompts) > PROMPTS_MAX:
            self._prompts.popitem(last=False)
        return prompt
