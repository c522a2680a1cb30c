"""Methods on models: capture, metrics, costs, comparison."""
