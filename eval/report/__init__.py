"""Result records, comparison, charts and the HTML report."""
