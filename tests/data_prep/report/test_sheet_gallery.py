from data_prep.report.sheet_gallery import spread_ranks


def test_shown_samples_come_from_all_parts():
    assert spread_ranks(0, num_shown=5, seed=0) == []
    assert spread_ranks(9, num_shown=0, seed=0) == []
    assert spread_ranks(3, num_shown=5, seed=0) == [0, 1, 2]
    ranks = spread_ranks(1000, num_shown=10, seed=4)
    assert [rank // 100 for rank in ranks] == list(range(10))
    assert ranks != spread_ranks(1000, num_shown=10, seed=5)
