"""What one does with finished runs: evaluate, export, the papers' table and figures."""
