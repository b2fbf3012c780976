"""The loss: its division by tokens, its reduction over ranks, its metrics and its anomalies."""
