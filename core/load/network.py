"""Whether a host that has the weights answers, found out in seconds, not minutes.

Left alone, a hub client without a network retries for most of a minute. One bounded request
says the same at once. It goes through urllib, so proxies of the environment count, and it runs
in a thread because a name look-up has no time-out of its own.
"""

from __future__ import annotations

import queue
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from core.errors import OfflineError, Remedy

DEADLINE_S = 4.0


def _probe(url: str, answers: queue.SimpleQueue[str | None]) -> None:
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=DEADLINE_S):
            answers.put(None)
    except urllib.error.HTTPError:
        # The host spoke: whatever it said about this address, the network is there.
        answers.put(None)
    except (OSError, ValueError) as error:
        answers.put(str(getattr(error, "reason", error)))


def require_host(url: str, *, what: str, remedy: Remedy) -> None:
    """Raise unless the host of `url` answers within `DEADLINE_S` seconds.

    Args:
        url: Any address on the host.
        what: What was wanted, for the message: 'weights of timm model "resnet18"'.
        remedy: What to do without it.

    Raises:
        OfflineError: No answer, or none in time.
    """
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_probe, args=(url, answers), daemon=True).start()
    try:
        reason = answers.get(timeout=DEADLINE_S)
    except queue.Empty:
        reason = f"no answer within {DEADLINE_S:.0f} seconds"
    if reason is not None:
        raise OfflineError(
            f"The {what} are not on this machine and {urlsplit(url).hostname} cannot be reached "
            f"({reason}).",
            remedy,
        )
