"""The page of measured figures says what the result files say."""

from experiments.pages import performance


def test_the_page_is_that_of_the_result_files():
    assert performance.PAGE.read_text() == performance.page(performance.RESULTS)
