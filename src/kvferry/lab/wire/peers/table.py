"""All peers. One line per family; a family whose package is missing is left out, with the reason."""

from collections.abc import Callable

from kvferry.errors import UsageError
from kvferry.lab.wire.peers.cachegen import cachegen_curve, cachegen_peers, lmcache_peers
from kvferry.lab.wire.peers.caches import hqq_peers, quanto_peers
from kvferry.lab.wire.peers.containers import container_peers
from kvferry.lab.wire.peers.integers import centred_peers, int_peers
from kvferry.lab.wire.peers.kivi import kivi_peers
from kvferry.lab.wire.peers.lossless import blosc2_peers, zipnn_peers
from kvferry.lab.wire.peers.peer import Peer
from kvferry.lab.wire.peers.pickled import pickled_peers
from kvferry.lab.wire.peers.turboquant import turboquant_peers

PEERS: tuple[Callable[[], list[Peer]], ...] = (
    int_peers,
    centred_peers,
    cachegen_peers,
    lmcache_peers,
    cachegen_curve,
    kivi_peers,
    turboquant_peers,
    quanto_peers,
    hqq_peers,
    pickled_peers,
    container_peers,
    zipnn_peers,
    blosc2_peers,
)


def installed_peers() -> tuple[list[Peer], list[str]]:
    """The peers that can run here, and one line for each family that cannot."""
    found: list[Peer] = []
    missing: list[str] = []
    for family in PEERS:
        try:
            found += family()
        except UsageError as error:
            missing.append(str(error))
    return found, missing
