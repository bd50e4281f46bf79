import { expect, test } from 'vitest';
import { SingleFlight } from '../../../src/host/single-flight.ts';

const never = new AbortController().signal;

/** A task that ends when told, counts its starts, and records when its own clean-up is done. */
function controlledTask() {
  const gate = Promise.withResolvers<void>();
  const seen = { starts: 0, cleanedUp: false };
  const task = async (signal: AbortSignal) => {
    seen.starts += 1;
    const aborted = Promise.withResolvers<never>();
    signal.addEventListener('abort', () => aborted.reject(signal.reason));
    try {
      await Promise.race([gate.promise, aborted.promise]);
    } finally {
      await Promise.resolve();
      seen.cleanedUp = true;
    }
  };
  return { seen, task, gate };
}

test('many callers of one key share one run', async () => {
  const { seen, task, gate } = controlledTask();
  const flights = new SingleFlight();
  const all = Promise.all(Array.from({ length: 50 }, () => flights.run('key', never, task)));
  gate.resolve();
  await all;
  expect(seen.starts).toBe(1);
});

test('different keys run side by side', async () => {
  const { seen, task, gate } = controlledTask();
  const flights = new SingleFlight();
  const all = Promise.all([flights.run('a', never, task), flights.run('b', never, task)]);
  expect(seen.starts).toBe(2);
  gate.resolve();
  await all;
});

test('every caller sees a failure, and the next call runs the task again', async () => {
  const { seen, task, gate } = controlledTask();
  const flights = new SingleFlight();
  const all = Promise.allSettled([flights.run('key', never, task), flights.run('key', never, task)]);
  gate.reject(new Error('no space'));
  expect((await all).map(({ status }) => status)).toEqual(['rejected', 'rejected']);
  await expect(flights.run('key', never, task)).rejects.toThrow('no space');
  expect(seen.starts).toBe(2);
});

test('one caller that gives up does not end the run of another', async () => {
  const { task, gate } = controlledTask();
  const flights = new SingleFlight();
  const impatient = new AbortController();
  const first = flights.run('key', impatient.signal, task);
  const second = flights.run('key', never, task);
  impatient.abort(new Error('gave up'));
  await expect(first).rejects.toThrow('gave up');
  gate.resolve();
  await expect(second).resolves.toBeUndefined();
});

test('the last caller that gives up aborts the run and waits for its clean-up', async () => {
  const { seen, task } = controlledTask();
  const flights = new SingleFlight();
  const impatient = new AbortController();
  const both = [flights.run('key', impatient.signal, task), flights.run('key', impatient.signal, task)];
  impatient.abort(new Error('gave up'));
  const results = await Promise.allSettled(both);
  expect(results.map(({ status }) => status)).toEqual(['rejected', 'rejected']);
  expect(seen.cleanedUp).toBe(true);
});

test('a caller that has given up already starts nothing', async () => {
  const { seen, task } = controlledTask();
  await expect(new SingleFlight().run('key', AbortSignal.abort(new Error('gave up')), task)).rejects.toThrow('gave up');
  expect(seen.starts).toBe(0);
});
