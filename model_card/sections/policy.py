"""The policy in force: its threshold and actions for each risk category."""

from safevlm.model_card.markdown import code, table, text

ACTIONS = {
    "allow": "the base model answers",
    "caution": "the model answers and is told to be careful",
    "warn": "the model is told to warn, and may decline",
    "refuse": "the request is refused",
}


def policy(config: dict) -> str:
    own, categories, levels = config["safety_policy"], config["category_names"], config["level_names"]
    if not own["enabled"]:
        return f"The policy is {code(own['name'])}: **nothing is enforced**, and the base model answers unfiltered."
    thresholds = own["category_risk_thresholds"]
    rows = []
    for name in categories:
        if name == config["safe_category"]:
            continue
        actions = {**own["level_actions"], **own["category_actions"].get(name, {})}
        cells = [f"`{actions.get(level, 'allow')}`" for level in levels]
        rows.append([text(name), f"{thresholds.get(name, own['risk_threshold']):.4g}", *cells])
    used = [action for action in ACTIONS if any(f"`{action}`" in row for row in rows)]
    meaning = "; ".join(f"`{action}`: {ACTIONS[action]}" for action in used)
    refusal = (
        f"The policy itself writes refusals (language: {code(own['language'])}), whatever the model would have said."
        if own["forced_refusal"]
        else "Refusals are only requested by a hint, so the language model has the last word."
    )
    calibrated = own["level_temperature"] != 1 or own["category_temperature"] != 1
    return f"""\
The policy is {code(own["name"])}. A request counts as risky if its probability of any risk reaches the threshold of
its most probable category. Its level then determines the action.

{table(["category", "threshold", *map(text, levels)], rows)}

{meaning}.

{refusal}

Temperatures of the probabilities: level {own["level_temperature"]:.4g}, category
{own["category_temperature"]:.4g}{"" if calibrated else " (not calibrated)"}."""
