"""Make all results anew on this machine: python -m benchmarks --help

The options are those of benchmarks.compare. The comparison goes to OUT; beside it go time against size, the ablation
(both with 4 layers), and what int8 costs in quality: scaling, ablation and int8-accuracy.
"""

from benchmarks import ablation, accuracy, compare


def main() -> None:
    options = compare.parse("python -m benchmarks")
    compare.main(options)
    options.layers, options.scaling, options.out = 4, True, options.out.with_name("scaling")
    compare.main(options)
    if options.device == "cpu":
        options.documents = 24
        ablation.main(options)
        accuracy.main(options.out.parent)


if __name__ == "__main__":
    main()
