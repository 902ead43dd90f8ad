"""What objslot offers, family by family: shapes, inputs, the least work."""
