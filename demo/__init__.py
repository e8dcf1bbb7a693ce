"""The demo model: a small LLaVA-1.5-shaped checkpoint that reads handwritten digits, and how it was made."""
