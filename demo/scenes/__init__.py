"""The demo model: a small LLaVA-NeXT that looks at scenes of digits and icons and answers questions about them."""
