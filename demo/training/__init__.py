"""What makes the demo model: material, scenes, questions and chats; architecture, student and training loop."""
