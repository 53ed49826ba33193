"""The card of an aligner folder: what it maps, what it was fitted under, and how well it does on held-out data."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvferry.align.contract import Aligner
from kvferry.kv import Geometry
from kvferry.train.fidelity import Fidelity
from kvferry.train.recipe import FitRecipe
from kvferry.train.scores import Score


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside scores. `method` tells in a line how the map came about."""

    sender: str
    receiver: str
    method: str
    data: str
    seconds: float
    command: str
    verdict: str = ""


def card(
    aligner: Aligner,
    recipe: FitRecipe,
    facts: CardFacts,
    fidelity: Fidelity,
    scores: Sequence[Score],
    controls: Sequence[Score],
) -> str:
    """Markdown for the folder's README.md."""
    rows = {**_facts(aligner, facts), "recipe": _recipe(recipe), **_nearness(fidelity)}
    lines = [f"# {facts.sender} to {facts.receiver}", ""]
    lines += [f"- **{key}**: {value}" for key, value in rows.items()]
    lines += ["", *([facts.verdict, ""] if facts.verdict else [])]
    lines += ["Answers right are those of which every token was the likeliest, given the tokens before.", ""]
    lines += ["| codec | nats per token | 95 % | answers right | 95 % |", "|---|---:|---|---:|---|"]
    lines += [_row(one.name, one) for one in scores]
    lines += [_row(f"control: {one.name}", one) for one in controls]
    return "\n".join([*lines, "", f"Made by `{facts.command}`.", ""])


def _facts(aligner: Aligner, facts: CardFacts) -> dict[str, str]:
    contract = aligner.contract
    n_parameters = sum(tensor.numel() for tensor in aligner.state_dict().values())
    return {
        "sender": _model(facts.sender, contract.sender),
        "receiver": _model(facts.receiver, contract.receiver),
        "grid": f"{contract.grid}, {contract.stride:.4f} receiver tokens per token sent",
        "coded_with": "; ".join(contract.coded_with),
        "method": facts.method,
        "data": facts.data,
        "size": f"{n_parameters:,} parameters, {4 * n_parameters / 1e6:.2f} MB",
        "time": f"{facts.seconds:.0f} s, {torch.get_num_threads()} threads of {platform.machine()}",
    }


def _model(name: str, geometry: Geometry) -> str:
    return f"{name} (model {geometry.model[:16]}, tokenizer {geometry.tokenizer[:16]})"


def _recipe(recipe: FitRecipe) -> str:
    loop = recipe.loop
    losses = " + ".join(f"{weight:g} {name}" for name, weight in recipe.losses.items())
    return (
        f"{recipe.aligner}, {loop.steps} steps of {recipe.data.batch_size} contexts at {loop.learning_rate:g}, "
        f"losses {losses}, {recipe.data.texts} texts for the closed form, seed {loop.seed}"
    )


def _nearness(fidelity: Fidelity) -> dict[str, str]:
    keys, values = (
        ", ".join(f"{one:.2f}" for one in part) for part in (fidelity.r2_keys, fidelity.r2_values)
    )
    return {
        "centred R2 of keys by layer": keys,
        "centred R2 of values by layer": values,
        "what queries read": f"cosine {fidelity.attention_cosine:.3f}, relative error {fidelity.attention_error:.3f}",
    }


def _row(name: str, one: Score) -> str:
    (low, high), (least, most) = one.loss_ci95, one.accuracy_ci95
    numbers = f"{one.loss:.3f} | {low:.3f} to {high:.3f} | {one.accuracy:.3f} | {least:.3f} to {most:.3f}"
    return f"| {name} | {numbers} |"
