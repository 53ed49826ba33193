"""What a fit leaves behind: the aligner's folder with its card, and what is shown of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry.align.contract import Aligner
from kvferry.align.folder import save_aligner
from kvferry.codec import Codec
from kvferry.codec.profile import save_profile
from kvferry.codec.profiles import SUFFIX, find_profile, name_of
from kvferry.train.auto import N_FIDELITY, Choice
from kvferry.train.card import CardFacts, card
from kvferry.train.cases import Way
from kvferry.train.examples import described
from kvferry.train.fidelity import Fidelity, fidelity
from kvferry.train.fit import Fitted, Material, score_controls
from kvferry.train.scores import Score


@dataclass(frozen=True)
class Report:
    """A fitted map, the text of its card, its held-out scores and controls; `verdict` is that of `--auto`.

    `n_left_out` texts were passed over in the closed form, for which the models have no positions.
    """

    aligner: Aligner
    codecs: Sequence[Codec]
    card: str
    scores: list[Score]
    controls: list[Score]
    seconds: float
    verdict: str = ""
    n_left_out: int = 0

    def save(self, folder: Path) -> None:
        """Write the folder, and beside the weights the profiles that its codecs use."""
        save_aligner(self.aligner, folder, self.card)
        for profile_hash in sorted({codec.profile_hash for codec in self.codecs} - {0}):
            held = find_profile(name_of(profile_hash))
            save_profile(held, folder / f"{held.name}{SUFFIX}")


def report_fit(fitted: Fitted, names: tuple[str, str], command: str) -> Report:
    """Of one map that was asked for."""
    material, loop = fitted.material, fitted.material.recipe.loop
    penalty = "" if fitted.penalty is None else f" (penalty {fitted.penalty:g}, chosen on dev)"
    method = f"{fitted.aligner.name} in closed form{penalty}"
    if fitted.trained is not None:
        method += f", then {fitted.trained.steps} of {loop.steps} steps, those of step {fitted.trained.best_step} kept"
    facts = CardFacts(*names, method, _data(material), fitted.seconds, command)
    near = _nearness(material, fitted.aligner)
    text = card(fitted.aligner, material.recipe, facts, near, fitted.scores, fitted.controls)
    n_left_out = _n_left_out(material)
    return Report(
        fitted.aligner, material.codecs, text, fitted.scores, fitted.controls, fitted.seconds, "", n_left_out
    )


def report_choice(choice: Choice, names: tuple[str, str], command: str, seconds: float) -> Report:
    """Of the best of many."""
    best, material = choice.best, choice.material
    verdict = _verdict(choice)
    tried = "; ".join(f"{one.spec} on the {one.grid} grid {one.dev_loss:.4f}" for one in choice.candidates)
    method = f"the best of {len(choice.candidates)} on dev (nats per token: {tried})"
    facts = CardFacts(*names, method, _data(material), seconds, command, verdict)
    controls = score_controls(material, best.aligner, material.take("test", len(choice.scores[0].nats)))
    text = card(
        best.aligner, material.recipe, facts, _nearness(material, best.aligner), choice.scores[:-1], controls
    )
    n_left_out = _n_left_out(material)
    return Report(
        best.aligner, material.codecs, text, choice.scores[:-1], controls, seconds, verdict, n_left_out
    )


def _verdict(choice: Choice) -> str:
    (low, high), better = choice.over_table.ci95, choice.over_table.difference
    worth = "worth it" if choice.worth_it else "not worth it"
    return f"{worth}: {better:.3f} nats per token better than the token table ({low:.3f} to {high:.3f})"


def _data(material: Material) -> str:
    name, seed = described(material.source.source), material.seed
    passed, left_out = _n_left_out(material), ""
    if passed:
        left_out = f", {passed} beside them left out for want of positions"
    texts = f"SHA-256 {material.digest[:16]} of the closed form's texts{left_out}"
    return f"{name}, {texts}, seed {seed}; scores are from test"


def _n_left_out(material: Material) -> int:
    return material.source.n_left_out("train", material.seed, material.recipe.data.texts)


def _nearness(material: Material, aligner: Aligner) -> Fidelity:
    route = material.route
    way = Way(route.sender, route.receiver, aligner, material.codecs[0])
    return fidelity(way, material.take("test", N_FIDELITY))
