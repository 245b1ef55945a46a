"""python -m bdh_look"""

from bdh_look.cli import main

main()
