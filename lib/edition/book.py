"""jupyter-book, without an import that takes a second: `python -m edition.book build FOLDER`; see `edition`."""

from jupyter_book.cli.main import main

if __name__ == "__main__":
    main(prog_name="jupyter-book")
