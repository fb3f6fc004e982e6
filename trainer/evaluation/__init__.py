"""Evaluation: the safety head's measures and calibration, refusals, judges and benchmarks.

The names below are imported from their modules when first used, so `import safevlm.trainer.evaluation` stays cheap.
"""

from importlib import import_module

from .environment import environment

_EXPORTS = {
    "benchmarks.pope": ("pope_metrics", "read_pope_labels"),
    "head.calibration": ("Calibration", "calibrate", "store_policy"),
    "head.measures": ("head_metrics", "trainer_metrics"),
    "head.plots": ("plot_calibration", "plot_head_report"),
    "head.predict": ("predict_rows",),
    "head.predictions": ("HeadPrediction", "read_predictions", "write_predictions"),
    "head.report": ("format_head_report", "head_report", "operating_point"),
    "judges.judge": ("Judge", "JudgeError"),
    "judges.judgements": ("JudgeItem", "Judgement"),
    "judges.local_judge": ("LocalJudge",),
    "judges.openai_judge": ("OpenAiJudge",),
    "judges.rules_judge": ("RulesJudge",),
    "judges.scores": ("judge_scores", "rtvlm_scores"),
    "refusals.detector": ("RefusalDetector", "RefusalVerdict"),
    "refusals.rates": ("attack_success_rate", "over_refusal_rate", "refusal_rate"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["environment", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return sorted(__all__)
