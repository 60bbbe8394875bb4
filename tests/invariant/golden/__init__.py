"""One loss curve that every way of training must follow: `curve.json`, made and followed by `run`."""
