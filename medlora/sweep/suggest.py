"""Which values a sweep tries next, and which of them mattered: Optuna, given everything that the ledger holds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medlora.seeds import derive_seed
from medlora.sweep.ledger import Trial
from medlora.sweep.space import Choice, Domain, Params

_TRIES = 50
"""Suggestions in a row that were all tried before, after which a space counts as exhausted."""


class Suggester:
    """An Optuna study in memory: suggests values, receives every score and end.

    The same seed and the same ended trials give the same suggestion; trials that ran when a sweep was killed are given
    to it again by `begin`.
    """

    def __init__(
        self, space: Mapping[str, Domain], method: str, seed: int, trials: int, known: Sequence[Trial] = ()
    ) -> None:
        optuna = _import_optuna()
        self.space = dict(space)
        self.distributions = {key: _make_distribution(domain) for key, domain in space.items()}
        # A sampler that began with the same numbers again would suggest the same values again.
        drawn = derive_seed(seed, "sweep", str(len(known)))
        if method == "tpe":
            # The default of 10 random trials first would leave a small sweep nothing to learn with.
            sampler = optuna.samplers.TPESampler(seed=drawn, n_startup_trials=max(4, min(10, trials // 3)))
        else:
            sampler = optuna.samplers.RandomSampler(seed=drawn)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.running: dict[str, Any] = {}
        self.tried: set[str] = set()
        for trial in known:
            self.tried.add(_name(trial.params))
            if trial.ended and self._holds(trial.params):
                self.study.add_trial(self._freeze(trial))

    def suggest(self) -> tuple[Any, dict[str, Any]] | None:
        """An Optuna trial and values that were not tried before; None when the space seems exhausted."""
        for _ in range(_TRIES):
            asked = self.study.ask(self.distributions)
            params = {key: _decode(self.space[key], value) for key, value in asked.params.items()}
            if _name(params) not in self.tried:
                return asked, params
            self.study.tell(asked, state=_import_optuna().trial.TrialState.FAIL)
        return None

    def begin(self, id: str, params: Params, asked: Any = None) -> None:
        """The trial runs from now on; `asked` is what `suggest` gave with its values."""
        self.tried.add(_name(params))
        if asked is None and self._holds(params):
            self.study.enqueue_trial({key: _encode(self.space[key], value) for key, value in params.items()})
            asked = self.study.ask(self.distributions)
        if asked is not None:
            self.running[id] = asked

    def add_score(self, id: str, step: int, score: float) -> None:
        """A score of a running trial."""
        if id in self.running:
            self.running[id].report(score, step)

    def end(self, trial: Trial) -> None:
        """The trial is over; of one that was stopped or diverged the sampler learns that its values are poor."""
        asked = self.running.pop(trial.id, None)
        if asked is not None:
            state, value = _classify(trial)
            self.study.tell(asked, value, state=state)

    def _holds(self, params: Params) -> bool:
        return all(domain.holds(params[key]) for key, domain in self.space.items())

    def _freeze(self, trial: Trial) -> object:
        state, value = _classify(trial)
        return _import_optuna().trial.create_trial(
            state=state,
            value=value,
            params={key: _encode(domain, trial.params[key]) for key, domain in self.space.items()},
            distributions=self.distributions,
            intermediate_values={int(row["step"]): row["score"] for row in trial.reports},
        )


def _classify(trial: Trial) -> tuple[object, float | None]:
    """Optuna's state and value of an ended trial.

    TPE ranks pruned trials below all complete ones, by how far they came, and ignores failed ones. A diverged trial
    counts as pruned, so that its values are not tried again and again.
    """
    states = _import_optuna().trial.TrialState
    if trial.state == "finished" and trial.score is not None:
        return states.COMPLETE, trial.score
    if trial.state == "stopped" or (trial.state == "failed" and not trial.deaths):
        return states.PRUNED, None
    return states.FAIL, None


def measure_importance(space: Mapping[str, Domain], trials: Iterable[Trial]) -> dict[str, float]:
    """How much of what makes trials good each key explains, adding up to 1, the most important first; {} of too few trials.

    PED-ANOVA (arXiv 2304.10255): how far the values of the best quarter are from those of all. A stopped trial counts
    with its last score. The unchanged config counts where its values lie in the space.
    """
    optuna = _import_optuna()
    distributions = {key: _make_distribution(domain) for key, domain in space.items()}
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        if trial.score is not None and all(domain.holds(trial.params[key]) for key, domain in space.items()):
            params = {key: _encode(domain, trial.params[key]) for key, domain in space.items()}
            study.add_trial(optuna.trial.create_trial(value=trial.score, params=params, distributions=distributions))
    scores = {trial.value for trial in study.trials}
    if len(study.trials) < 4 or len(scores) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(value) for key, value in found.items()}


def _import_optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _make_distribution(domain: Domain) -> object:
    distributions = _import_optuna().distributions
    if isinstance(domain, Choice):
        return distributions.CategoricalDistribution([json.dumps(value, ensure_ascii=False) for value in domain.values])
    if domain.whole:
        return distributions.IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return distributions.FloatDistribution(domain.low, domain.high, log=domain.log)


def _encode(domain: Domain, value: object) -> object:
    return json.dumps(value, ensure_ascii=False) if isinstance(domain, Choice) else value


def _decode(domain: Domain, value: Any) -> Any:
    return json.loads(value) if isinstance(domain, Choice) else domain.round(value)


def _name(params: Params) -> str:
    return json.dumps(params, sort_keys=True, ensure_ascii=False)
