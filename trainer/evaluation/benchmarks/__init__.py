"""Systems asked over benchmark tasks with lmms-eval: answers, their metrics, and the table that compares them."""
