"""The facade over codec and wire: every name packs, unpacks to the codec's roundtrip, and refuses what is foreign."""

import pytest

import contract
from kvferry.codec import roundtrip
from kvferry.errors import BadSpec, BudgetTooSmall, ForeignModel, UnknownName, WireError
from kvferry.session.token_coder import QUANTIZATIONS, TokenDecoder, TokenEncoder


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_what_is_decoded_is_the_roundtrip(quantization, compression):
    if (quantization, compression) == ("ecsq", "zstd"):
        with pytest.raises(BadSpec, match="entropy coded already"):
            TokenEncoder(quantization, compression)
        return
    encoder, kv = TokenEncoder(quantization, compression), contract.cache(contract.RAGGED)
    contract.same(TokenDecoder(kv.geometry).decode(encoder.encode(kv)), roundtrip(encoder.codec, kv))


def test_a_spec_is_a_quantization_too():
    assert TokenEncoder("int(bits=3)").codec.bits == 3


def test_what_is_wrong_is_named():
    with pytest.raises(UnknownName, match="zstd"):
        TokenEncoder("int8", "zst")
    with pytest.raises(UnknownName, match="int"):
        TokenEncoder("int9")
    kv = contract.cache()
    with pytest.raises(BudgetTooSmall):
        TokenEncoder().encode(kv, max_bytes=20)
    data = TokenEncoder().encode(kv)
    with pytest.raises(ForeignModel):
        TokenDecoder(contract.geometry(model="ee")).decode(data)
    with pytest.raises(WireError):
        TokenDecoder(kv.geometry).decode(data[:-1])
