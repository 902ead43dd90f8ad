"""What a user would run instead, family by family."""
