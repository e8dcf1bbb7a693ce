"""What the demo model is worth: accuracy per question type, two hundred held-out questions, the model card."""
