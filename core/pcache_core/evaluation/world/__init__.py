"""A tiny world of persons, companies and cities, to measure answers from documents in."""
