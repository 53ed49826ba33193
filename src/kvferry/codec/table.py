"""The table of codecs. One line per codec; one file per codec beside it."""

from typing import TYPE_CHECKING

from kvferry.spec import Table

if TYPE_CHECKING:
    from kvferry.codec.base import Codec

ON_THE_WIRE = {
    "ecsq": "kvferry.codec.ecsq:Ecsq",
    "fp8": "kvferry.codec.fp8:Fp8",
    "int": "kvferry.codec.integer:Int",
    "mixed": "kvferry.codec.mixed:Mixed",
    "nf4": "kvferry.codec.nf4:Nf4",
    "progressive": "kvferry.codec.progressive:Progressive",
    "raw": "kvferry.codec.raw:Raw",
}
"""What a message may name. Plug-ins are not among them: a message must never choose what is imported."""

CODECS: "Table[Codec]" = Table("codec", ON_THE_WIRE)
