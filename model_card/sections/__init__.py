"""The generated sections of a card; `template.md` puts them in order.

    about.py      summary, how to use the model, limits and risks, licence
    policy.py     the policy in force
    results.py    results of evaluations, calibration
    training.py   training data and hyper-parameters, environmental impact

Each function returns Markdown, from the facts (`facts.py`) and the model's `config.json`. Names and fields from there
are escaped (`markdown.py`).
"""
