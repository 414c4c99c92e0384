"""One sequence on several processes."""
