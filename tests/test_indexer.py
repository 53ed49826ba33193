"""Lightning indexers: the formula, what they learn from, folders that are refused, and what few steps teach."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from architectures import build
from kvferry.cli import app
from kvferry.errors import BadSpec, FolderError, ForeignModel, NotFinite, ShapeMismatch, UsageError
from kvferry.kv import Evidence
from kvferry.models.load import Model, load
from kvferry.models.rotary import reset_call_state
from kvferry.models.scores import scores_of
from kvferry.rope import NO_ROTATION, RotarySpec
from kvferry.select import SELECTORS
from kvferry.select.indexer import (
    INDEXERS,
    MAX_WEIGHTS,
    Indexer,
    IndexerShape,
    LayerIndexer,
    index_scores,
    turning,
)
from kvferry.select.lightning import expected
from kvferry.select.sight import Sight
from kvferry.session.selecting import look
from kvferry.train.attended import Attended, attend
from kvferry.train.examples import Batches, Worlds
from kvferry.train.indexer_card import indexer_card
from kvferry.train.indexer_fit import (
    FittedIndexer,
    IndexerRecipe,
    divergence,
    fit_indexer,
    new_indexer,
    train_scorer,
    unseen_texts,
)
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.mass_held import (
    CONTROLS,
    FEWEST_TOKENS,
    PROPORTIONS,
    mass_held,
    measure,
    n_kept,
    of_indexer,
)
from tiny import model_of, random_rows, tokens_of

TURNING = RotarySpec("interleaved", dim=8, inv_freq=(1.0, 0.3, 0.1, 0.03))
FEW = IndexerRecipe(
    heads=2,
    dim=16,
    max_tokens=48,
    n_dev=4,
    n_test=12,
    loop=LoopRecipe(steps=40, learning_rate=2e-2, warmup=5),
)
TEXT = "Bob has the lamp. Eve has the coin. Ann has the drum."


@pytest.fixture(scope="module")
def model() -> Model:
    return load("llama")


@pytest.fixture(scope="module")
def fitted(model: Model) -> FittedIndexer:
    return fit_indexer(model, Worlds(n_alike=2), FEW)


@pytest.fixture
def folder(tmp_path: Path, fitted: FittedIndexer) -> Path:
    config = asdict(fitted.indexer.shape)
    INDEXERS.save(fitted.indexer, fitted.indexer.geometry, config, tmp_path / "indexer", "a card\n")
    return tmp_path / "indexer"


@pytest.fixture(scope="module")
def texts(model: Model) -> Attended:
    rows = next(Batches(Worlds(n_alike=2), "test", 0, 4)(0))
    return attend(model, [row.context for row in rows], scores_of(model), 48)


def sight_of(model: Model) -> Sight:
    [sight] = look(model, [TEXT], ("hidden_states",))
    return sight


def turned(vector: list[float], position: int, spec: RotarySpec) -> list[float]:
    """A pair of channels is a complex number, and a position an angle."""
    out, n = list(vector), spec.dim // 2
    for pair, frequency in enumerate(spec.inv_freq):
        number = complex(vector[pair], vector[pair + n]) * complex(
            math.cos(position * frequency), math.sin(position * frequency)
        )
        out[pair], out[pair + n] = number.real, number.imag
    return out


@given(heads=st.integers(1, 3), dim=st.integers(1, 5), new=st.integers(1, 3), tokens=st.integers(1, 4))
def test_scores_are_those_of_the_formula(heads: int, dim: int, new: int, tokens: int):
    queries, weights = torch.randn(2, heads, new, dim), torch.randn(2, heads, new)
    keys = torch.randn(2, tokens, dim)
    got = index_scores(queries, weights, keys)
    for batch in range(2):
        for t in range(new):
            for s in range(tokens):
                want = 0.0
                for j in range(heads):
                    product = sum(
                        queries[batch, j, t, d].item() * keys[batch, s, d].item() for d in range(dim)
                    )
                    want += weights[batch, j, t].item() * max(product, 0.0)
                assert got[batch, t, s].item() == pytest.approx(want, abs=1e-5)


def test_a_layer_is_the_formula_over_its_input():
    heads, dim, hidden, n_tokens, n_last = 3, 16, 6, 5, 2
    layer = LayerIndexer(IndexerShape(hidden, heads, dim), TURNING)
    states, positions = 3 * torch.randn(1, n_tokens, hidden), torch.tensor([[0, 1, 4, 5, 9]])
    with torch.no_grad():
        got = layer(states, positions, n_last)[0]
        for new, t in enumerate(range(n_tokens - n_last, n_tokens)):
            unit = [states[0, i] / states[0, i].square().mean().sqrt() for i in range(n_tokens)]
            queries = (layer.queries.weight @ unit[t]).view(heads, dim).tolist()
            weights = (layer.weights.weight @ unit[t] + layer.weights.bias).tolist()
            for s in range(n_tokens):
                raw = layer.keys.weight @ unit[s]
                centred = (raw - raw.mean()) / (raw.var(unbiased=False) + layer.norm.eps).sqrt()
                key = turned(centred.tolist(), int(positions[0, s]), layer.rotary)
                want = 0.0
                for j in range(heads):
                    query = turned(queries[j], int(positions[0, t]), layer.rotary)
                    product = sum(a * b for a, b in zip(query, key, strict=True))
                    want += weights[j] / math.sqrt(heads * dim) * max(product, 0.0)
                assert got[new, s].item() == pytest.approx(want, abs=1e-4)


def test_only_distances_count():
    layer = LayerIndexer(IndexerShape(6, 2, 16), TURNING)
    states, positions = torch.randn(1, 7, 6), torch.arange(7).unsqueeze(0)
    torch.testing.assert_close(layer(states, positions, 7), layer(states, positions + 100, 7))
    assert not torch.allclose(layer(states, positions, 7), layer(states, 2 * positions, 7))


@given(n_known=st.integers(1, 9), dim=st.integers(1, 40))
def test_half_the_channels_turn_by_the_models_frequencies(n_known: int, dim: int):
    known = tuple(0.5**i for i in range(n_known))
    spec = turning(RotarySpec("half", dim=2 * n_known, inv_freq=known), dim)
    assert len(spec.inv_freq) == dim // 4
    assert set(spec.inv_freq) <= set(known)
    assert list(spec.inv_freq) == sorted(spec.inv_freq, reverse=True)


def test_a_layer_without_rotation_has_an_indexer_without():
    assert turning(NO_ROTATION, 64) == NO_ROTATION


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (MAX_WEIGHTS, 2, 1)])
def test_an_impossible_shape_is_refused(sizes: tuple[int, int, int]):
    with pytest.raises(BadSpec, match="indexer heads"):
        IndexerShape(*sizes)


def test_hidden_states_of_another_width_are_refused():
    layer = LayerIndexer(IndexerShape(6, 2, 8), TURNING)
    with pytest.raises(ShapeMismatch, match="5 channels, 6 were fitted"):
        layer(torch.randn(1, 3, 5), torch.arange(3).unsqueeze(0), 3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen2-sliding", "gpt_oss"])
def test_what_is_learned_from_is_the_models_own_attention(name: str):
    rows = [*random_rows(1, 12), *random_rows(1, 17)]
    tiny, hf = model_of(name), build(name)
    seen = attend_ids(tiny, rows)
    found = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        for number, row in enumerate(rows):
            reset_call_state(hf)
            with torch.no_grad():
                own = hf(torch.tensor([row]), output_attentions=True, use_cache=False).attentions
            for layer, weights in enumerate(own):
                want = weights[0].sum(0)
                want = want / want.sum(-1, keepdim=True)
                got = seen.shares(layer, 17)[number, -len(row) :, -len(row) :]
                torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    finally:
        hf.set_attn_implementation(found)
    assert float(seen.shares(0, 17)[0, :5].abs().max()) == 0.0


def attend_ids(tiny: Model, rows: list[list[int]]) -> Attended:
    from kvferry.models.capture import capture_rotated

    found = capture_rotated(tiny, tokens_of(rows), ("queries_rotated", "hidden_states"))
    return Attended(found.kv, found.evidence, scores_of(tiny))


def test_a_text_is_read_as_far_as_is_asked(model: Model):
    scores = scores_of(model)
    whole, short = attend(model, [TEXT, "Bob"], scores, 99), attend(model, [TEXT, "Bob"], scores, 7)
    assert short.n_tokens == 7 < whole.n_tokens
    assert short.kv.present[0].sum(-1).tolist() == [7, min(7, int(whole.kv.present[0, 1].sum()))]
    torch.testing.assert_close(short.states(1)[0], whole.states(1)[0, :7], atol=1e-4, rtol=1e-4)


def test_the_divergence_is_zero_for_the_attention_itself_alone(texts: Attended):
    def knowing(seen, layer, n_last):
        return seen.shares(layer, n_last).clamp(min=1e-30).log()

    def wrong(seen, layer, n_last):
        return -knowing(seen, layer, n_last)

    assert divergence(knowing, texts).total.item() == pytest.approx(0.0, abs=1e-3)
    assert divergence(CONTROLS["random"], texts).total.item() > 1
    assert divergence(wrong, texts).total.item() > divergence(CONTROLS["random"], texts).total.item()


def test_the_divergence_of_a_batch_is_that_of_its_texts(model: Model):
    indexer, scores = new_indexer(model, FEW), scores_of(model)
    contexts = [TEXT, "Bob has the lamp."]
    both = divergence(of_indexer(indexer), attend(model, contexts, scores, 48))
    single = [divergence(of_indexer(indexer), attend(model, [one], scores, 48)) for one in contexts]
    assert both.n == sum(one.n for one in single)
    assert both.total.item() == pytest.approx(sum(one.total.item() for one in single), rel=1e-4)


def test_one_step_lowers_the_divergence(model: Model, texts: Attended):
    indexer = new_indexer(model, FEW)
    before = divergence(of_indexer(indexer), texts)
    before.total.backward()
    with torch.no_grad():
        for weight in indexer.parameters():
            weight -= 1e-4 * weight.grad
    assert divergence(of_indexer(indexer), texts).total.item() < before.total.item()


def test_the_seed_decides_everything(model: Model):
    def weights(seed: int) -> torch.Tensor:
        recipe = replace(FEW, loop=LoopRecipe(steps=2, seed=seed))
        indexer = new_indexer(model, recipe)
        train_scorer(indexer, of_indexer(indexer), model, Worlds(n_alike=2), recipe)
        return torch.nn.utils.parameters_to_vector(indexer.parameters())

    first = weights(0)
    torch.manual_seed(5)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_few_steps_hold_more_than_scores_that_see_no_query(fitted: FittedIndexer):
    held = {(one.name, one.proportion): one for one in fitted.held}
    for proportion in PROPORTIONS:
        ours = held["lightning", proportion]
        for control in CONTROLS:
            assert ours.typical > held[control, proportion].typical + 0.05
            assert ours.lowest > held[control, proportion].lowest
    assert all(0 <= share <= 1.0001 for one in fitted.held for share in (*one.queries, *one.windows))


def test_few_steps_are_better_than_none(model: Model, fitted: FittedIndexer):
    none = measure(
        {"lightning": of_indexer(new_indexer(model, FEW))}, unseen_texts(model, Worlds(n_alike=2), FEW)
    )
    assert fitted.held[0].typical > none[0].typical


@given(n_tokens=st.integers(1, 9), seed=st.integers(0, 99), proportion=st.floats(0.01, 1.0))
def test_the_mass_held_is_what_a_loop_finds(n_tokens: int, seed: int, proportion: float):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (1, 2, n_tokens), generator=generator).float()
    visible = torch.rand(1, 2, n_tokens, generator=generator) < 0.7
    visible[..., 0] = True
    shares = torch.rand(1, 2, n_tokens, generator=generator) * visible
    got = mass_held(scores, shares, visible, proportion)
    for query in range(2):
        slots = [s for s in range(n_tokens) if visible[0, query, s]]
        k = max(math.ceil(len(slots) * proportion - 1e-6), 1)
        kept = sorted(slots, key=lambda s: -scores[0, query, s].item())[:k]
        best = sorted(slots, key=lambda s: -shares[0, query, s].item())[:k]
        mine, most = (sum(shares[0, query, s].item() for s in some) for some in (kept, best))
        assert got[0, query].item() == pytest.approx(mine / most, rel=1e-4)
        assert n_kept(visible, proportion)[0, query].item() == k
    assert torch.allclose(mass_held(shares, shares, visible, proportion), torch.ones(1, 2))


def test_a_folder_gives_the_indexer_back(model: Model, folder: Path, fitted: FittedIndexer):
    came = INDEXERS.load(folder, model.geometry)
    for name, tensor in fitted.indexer.state_dict().items():
        assert torch.equal(came.state_dict()[name], tensor)
    assert not any(weight.requires_grad for weight in came.parameters())


@pytest.mark.parametrize("other", ["model", "tokenizer"])
def test_a_foreign_model_is_refused(model: Model, folder: Path, other: str):
    foreign = replace(model.geometry, **{other: "ab" * 32})
    with pytest.raises(ForeignModel, match=f"fitted for {other}"):
        INDEXERS.load(folder, foreign)
    read = sight_of(load("qwen3"))
    with pytest.raises(ForeignModel):
        SELECTORS.parse(f"lightning(indexer='{folder}')").plan(read)


def test_a_foreign_geometry_is_refused(model: Model, folder: Path):
    fewer = replace(model.geometry, layers=model.geometry.layers[:-1])
    with pytest.raises(ForeignModel, match="fitted for geometry"):
        INDEXERS.load(folder, fewer)


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "importance"},
        {"heads": 3},
        {"heads": 0},
        {"heads": "8"},
        {"dim": 2**40},
        {"hidden": None},
    ],
    ids=str,
)
def test_a_folder_whose_config_is_wrong_is_refused(model: Model, folder: Path, changed: dict[str, object]):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(FolderError):
        INDEXERS.load(folder, model.geometry)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_corrupt_folder_is_refused(model: Model, folder: Path, name: str, how: str):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if how == "cut":
        (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(FolderError):
        INDEXERS.load(folder, model.geometry)
    with pytest.raises(FolderError):
        INDEXERS.load(folder / "nowhere", model.geometry)


def test_weights_that_are_no_numbers_are_refused(model: Model, folder: Path):
    weights = load_file(folder / "model.safetensors")
    weights["layers.1.keys.weight"][2, 3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(FolderError, match="NaN"):
        INDEXERS.load(folder, model.geometry)


def test_hidden_states_that_are_no_numbers_are_refused(model: Model, folder: Path):
    sight = sight_of(model)
    sight.evidence.hidden_states[2][0, 4, 0] = float("nan")
    with pytest.raises(NotFinite, match="layer 2"):
        SELECTORS.parse(f"lightning(indexer='{folder}')").plan(sight)


def test_lightning_needs_an_indexer_and_hidden_states(model: Model, folder: Path):
    with pytest.raises(UsageError, match="fit-indexer"):
        SELECTORS.parse("lightning").plan(sight_of(model))
    with pytest.raises(UsageError, match="hidden_states"):
        SELECTORS.parse(f"lightning(indexer='{folder}')").plan(replace(sight_of(model), evidence=Evidence()))
    with pytest.raises(BadSpec, match="window"):
        SELECTORS.parse("lightning(window=0)")


def test_lightning_keeps_what_its_indexer_expects(model: Model, folder: Path, fitted: FittedIndexer):
    sight = sight_of(model)
    plan = SELECTORS.parse(f"lightning(indexer='{folder}', window=3, proportion=0.2, per_layer=True)").plan(
        sight
    )
    for layer in range(model.geometry.n_layers):
        scores = fitted.indexer(layer, sight.evidence.hidden_states[layer], sight.read.positions[0], 3)[0]
        n_read, total = sight.read.n_tokens, torch.zeros(sight.read.n_tokens)
        for row, t in enumerate(range(n_read - 3, n_read)):
            total[: t + 1] += scores[row, : t + 1].softmax(0)
        of_slots = total / torch.tensor([min(3, n_read - s) for s in range(n_read)])
        of_slots = of_slots[sight.carried.int().argmax(-1)]
        n_kept_here = math.ceil(0.2 * sight.kv.n_tokens)
        want = sorted(of_slots.topk(n_kept_here).indices.tolist())
        assert plan.classes[layer, 0].nonzero().flatten().tolist() == want


def test_what_is_expected_of_one_query_adds_up_to_one(model: Model, fitted: FittedIndexer):
    shares = expected(fitted.indexer, sight_of(model), 1, 1)
    assert shares.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_a_layer_looks_no_further_than_its_window(fitted: FittedIndexer):
    tiny = model_of("qwen2-sliding")
    windows = [layer.window for layer in tiny.geometry.layers]
    assert any(windows)
    seen = attend_ids(tiny, random_rows(1, 20))
    sight = Sight(
        seen_content(tiny, seen), seen_content(tiny, seen), torch.eye(20, dtype=torch.bool), seen.evidence
    )
    indexer = Indexer(tiny.geometry, IndexerShape(seen.states(0).shape[-1], 2, 8))
    for layer, window in enumerate(windows):
        shares = expected(indexer, sight, layer, 1)
        assert (shares > 0).sum().item() == min(window or 20, 20)


def seen_content(tiny: Model, seen: Attended):
    from kvferry.kv import Group

    groups = tuple(
        Group(g.layers, torch.stack([seen.content_keys(i) for i in g.layers]), g.values)
        for g in seen.kv.groups
    )
    return replace(seen.kv, groups=groups, space="content")


@pytest.mark.parametrize("name", ["heads", "dim", "batch_size", "max_tokens", "n_dev", "n_test"])
def test_a_recipe_out_of_range_is_refused(name: str):
    with pytest.raises(UsageError, match=f"{name} is 0"):
        IndexerRecipe(**{name: 0})


def test_the_fewest_tokens_are_those_that_leave_a_query_to_measure(model: Model):
    with pytest.raises(UsageError, match=f"max_tokens is {FEWEST_TOKENS - 1}, .*at least {FEWEST_TOKENS}"):
        IndexerRecipe(max_tokens=FEWEST_TOKENS - 1)
    few, enough = (
        measure({"recent": CONTROLS["recent"]}, [attend(model, [TEXT], scores_of(model), n)])
        for n in (FEWEST_TOKENS - 1, FEWEST_TOKENS)
    )
    assert min(held.n_queries for held in enough) == 1 and all(0 < held.lowest <= 1 for held in enough)
    assert min(held.n_queries for held in few) == 0


def test_the_card_says_what_was_measured(fitted: FittedIndexer):
    text = indexer_card(fitted, "llama", "worlds", "kvferry fit-indexer --out DIR")
    assert f"{fitted.held[0].queries[0]:.3f}" in text
    assert fitted.indexer.geometry.model[:16] in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(fitted.held)
    assert len({line.count("|") for line in rows}) == 1


def test_the_verb_writes_a_folder_that_the_selector_takes(model: Model, tmp_path: Path):
    words = ["fit-indexer", "--steps", "1", "--dim", "8", "--heads", "1", "--max-tokens", "16", "--json"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "one")])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert {row["name"] for row in said["held"]} == {"lightning", *CONTROLS}
    assert "--steps 1" in (tmp_path / "one" / "README.md").read_text()
    plan = SELECTORS.parse(f"lightning(indexer='{tmp_path / 'one'}', proportion=0.5)").plan(sight_of(model))
    n_slots = plan.classes.shape[-1]
    assert int((plan.classes[0, 0] > 0).sum()) == math.ceil(n_slots / 2)
