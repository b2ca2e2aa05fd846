"""The harness that shows what lastgood promises: every operation, broken at every call and looked at afterwards.

Each lane is a module with the same three functions:

    points()     the names of its points, in order
    run(point)   what is wrong after this one, in words; "" if nothing is
    main()       the lane by itself, from the command line
"""
