"""fastpie in other systems; each module needs an extra of its own and is imported by name."""
