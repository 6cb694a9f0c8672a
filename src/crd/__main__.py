from crd.cli import main

main()
