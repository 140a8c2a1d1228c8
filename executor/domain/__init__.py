"""The executor's rules, pure: attempts, routing, PSP health, what an answer means, when to ask again."""
