"""python -m bdh_train"""

from bdh_train.cli import main

main()
