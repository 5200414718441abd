"""What training costs, measured: one program a question (README.md)."""
