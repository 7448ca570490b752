"""Which weights make a unit and which read it: the network's real connectivity, unit by unit.

A unit cannot be reset alone unless all that reads it is known: a residual sum adds two layers
into one channel, a concatenation moves channels to other places, a grouped convolution reads a
part of them, attention ties queries, keys and values of a head together. Names tell none of
this. So the network is traced once into a graph of plain tensor operations, and every entry of
every activation carries a label, the unit it belongs to. Operations that move data move the
labels by being run on them; sums and products tie labels together; convolutions and matrix
products read labels and make new ones; anything that mixes units without weights (a layer norm
over channels, a softmax, an operation not known here) ties all of them, so that what cannot be
told apart is never reset apart. What the readers of units read on images is taken in passes of
their own, at the same products.
"""

from core.network.connections.readings import readings_of
from core.network.connections.tracer import connections_of
from core.network.connections.wiring import (
    NOBODY,
    Connections,
    Part,
    Reading,
    Readings,
    Role,
    Shifts,
    Wiring,
)

__all__ = [
    "NOBODY",
    "Connections",
    "Part",
    "Reading",
    "Readings",
    "Role",
    "Shifts",
    "Wiring",
    "connections_of",
    "readings_of",
]
