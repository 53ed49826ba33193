"""The table of selectors. One line per selector; one file per selector beside it."""

from typing import TYPE_CHECKING

from kvferry.spec import Table

if TYPE_CHECKING:
    from kvferry.select.contract import Selector

SELECTORS: "Table[Selector]" = Table(
    "selector",
    {
        "adaptive": "kvferry.select.adaptive:Adaptive",
        "all": "kvferry.select.all:All",
        "attention_mass": "kvferry.select.attention_mass:AttentionMass",
        "back": "kvferry.select.back:Back",
        "delta": "kvferry.select.delta:Delta",
        "every_kth": "kvferry.select.every_kth:EveryKth",
        "expected_attention": "kvferry.select.expected_attention:ExpectedAttention",
        "front": "kvferry.select.front:Front",
        "keydiff": "kvferry.select.keydiff:KeyDiff",
        "knorm": "kvferry.select.knorm:Knorm",
        "kvcomm": "kvferry.select.kvcomm:KVComm",
        "lagrangian": "kvferry.select.lagrangian:Lagrangian",
        "lightning": "kvferry.select.lightning:Lightning",
        "middle": "kvferry.select.middle:Middle",
        "oracle_delta": "kvferry.select.oracle_delta:OracleDelta",
        "proj_vnorm": "kvferry.select.proj_vnorm:ProjVnorm",
        "qkvcomm": "kvferry.select.qkvcomm:QKVComm",
        "question": "kvferry.select.question:Question",
        "random": "kvferry.select.random:Random",
        "rd_greedy": "kvferry.select.rd_greedy:RdGreedy",
        "schedule": "kvferry.select.schedule:Schedule",
        "semantic_indexer": "kvferry.select.semantic_indexer:SemanticIndexer",
        "sensitive_layers": "kvferry.select.sensitive_layers:SensitiveLayers",
        "sinks_recent": "kvferry.select.sinks_recent:SinksRecent",
        "snapkv": "kvferry.select.snapkv:SnapKV",
        "tova": "kvferry.select.tova:Tova",
        "value_aware": "kvferry.select.value_aware:ValueAware",
        "vnorm": "kvferry.select.vnorm:Vnorm",
    },
)
