/** Long work on a page that goes on answering. */

const SLICE = 16; // milliseconds of work before the page may breathe

/**
 * Run a generator to its end, a little at a time.
 * @template Step, Result
 * @param {Generator<Step, Result>} steps
 * @param {() => boolean} is_wanted still; asked after each breath
 * @param {(step: Step) => void} told how far it is
 * @returns {Promise<Result | undefined>} undefined once nobody wants it
 */
export async function in_slices(steps, is_wanted, told = () => {}) {
  for (;;) {
    const begun = performance.now();
    let step;
    do step = steps.next();
    while (!step.done && performance.now() - begun < SLICE);
    if (step.done) return step.value;
    told(step.value);
    await new Promise((resume) => setTimeout(resume));
    if (!is_wanted()) return undefined;
  }
}
