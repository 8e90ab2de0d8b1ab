"""The parts of the campaign: one promise each."""
