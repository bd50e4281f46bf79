import { beforeEach, expect, test } from 'vitest';
import { loggerTo } from '../../../../src/observe/logger.ts';
import { LineLimit } from '../../../../src/vmm/firecracker/line-limit.ts';
import { FirecrackerLog } from '../../../../src/vmm/firecracker/log.ts';
import { FirecrackerMetrics } from '../../../../src/vmm/firecracker/metrics.ts';

let lines: Record<string, unknown>[];
const logger = loggerTo({ write: (line) => void lines.push(JSON.parse(line)) }, 'trace');
beforeEach(() => {
  lines = [];
});

/** As v1.16.1 writes it. */
const line = (level: string, words: string) => `2026-11-25T21:46:47.421841890 [one-7:fc_vcpu 0:${level}] ${words}`;

test("a line of Firecracker's log is one of Kiln's, of the level that it has for a host", () => {
  const log = new FirecrackerLog(logger);
  const levels = { ERROR: 'warn', WARN: 'info', INFO: 'debug', DEBUG: 'debug', TRACE: 'debug' };
  for (const [theirs, ours] of Object.entries(levels)) {
    log.add(line(theirs, 'words: [of] it'));
    expect(lines.at(-1)).toMatchObject({
      ...{ level: ours, vm: 'one-7', thread: 'fc_vcpu 0', msg: 'Firecracker: words: [of] it' },
    });
  }
});

test('a line of another form is told as it is, without what a terminal would obey', () => {
  new FirecrackerLog(logger).add('torn \u001b[2Jline');
  expect(lines).toMatchObject([{ level: 'debug', msg: 'Firecracker: torn line' }]);
});

test('the last errors and the exit code are kept', () => {
  const log = new FirecrackerLog(logger);
  expect([log.lastWords(), log.exitCode]).toEqual(['', null]);
  for (const words of ['one', 'two', 'three', 'four']) log.add(line('ERROR', words));
  log.add(line('INFO', 'the guest says: Firecracker exiting successfully. exit_code=0'));
  expect(log.exitCode).toBeNull();
  log.add(line('ERROR', 'Firecracker exiting with error. exit_code=148'));
  expect([log.lastWords(), log.exitCode]).toEqual(['two; three; four', 148]);
});

test('the limit gives so many lines in each minute, and says which is the last', () => {
  const limit = new LineLimit(2);
  const asked = [0, 1, 2, 59_999, 60_000, 60_001, 60_002];
  expect(asked.map((nowMs) => limit.take(nowMs))).toEqual(['yes', 'last', 'no', 'no', 'yes', 'last', 'no']);
});

test('metrics are added up, drives only in sum, and durations not at all', () => {
  const metrics = new FirecrackerMetrics(logger);
  const flush = {
    ...{ utc_timestamp_ms: 1, latencies_us: { pause_vm: 5 }, api_server: { process_startup_time_us: 9 } },
    ...{ block: { read_count: 3, write_count: 0 }, block_rw0: { read_count: 3 } },
  };
  for (const _ of [1, 2]) metrics.add(JSON.stringify(flush));
  expect(metrics.totals).toEqual({ 'block.read_count': 6 });
  expect(lines).toEqual([]);
});

test('failures are told, and what is no metrics is not', () => {
  const metrics = new FirecrackerMetrics(logger);
  metrics.add(JSON.stringify({ seccomp: { num_faults: 1 }, signals: { sigbus: 2 }, logger: { missed_log_count: 3 } }));
  const failed = { 'seccomp.num_faults': 1, 'signals.sigbus': 2, 'logger.missed_log_count': 3 };
  expect(lines).toMatchObject([{ level: 'warn', failed }]);
  for (const other of ['', '{"torn":', 'null', '7', '{"a":{"b":-1,"c":"x","d":1.5,"e":{}}}']) metrics.add(other);
  expect(metrics.totals).toEqual(failed);
});

test('names that a Firecracker makes up without end take no memory without end', () => {
  const metrics = new FirecrackerMetrics(logger);
  metrics.add(JSON.stringify({ a: Object.fromEntries(Array.from({ length: 2000 }, (_, name) => [`x${name}`, 1])) }));
  expect(Object.keys(metrics.totals)).toHaveLength(1000);
});
