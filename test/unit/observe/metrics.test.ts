import { mkdtempSync, rmSync } from 'node:fs';
import { request } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Metrics } from '../../../src/observe/metrics.ts';
import { parseAddress, serveMetrics } from '../../../src/observe/metrics-server.ts';
import { Timeline, type TimelineMark } from '../../../src/observe/timeline.ts';

const shelf = { template: 'k1', waiting: 2, wanted: 3, hits: 5, misses: 1, died: 0 };

function metricsOf({ containers = 3, pool = [shelf] } = {}): Metrics {
  return new Metrics({
    containers: () => containers,
    templates: () => ({ restored: 7, restoresFailed: 1 }),
    pool: () => pool,
    firecracker: () => ({ 'vsock.conn_event_fails': 4 }),
  });
}

function started(...marks: [TimelineMark, number][]): Timeline {
  const timeline = new Timeline();
  for (const [name, atMs] of marks) timeline.mark(name, atMs);
  return timeline;
}

/** The samples of the metrics of one name. */
async function samples(metrics: Metrics, name: string): Promise<string[]> {
  return (await metrics.text()).split('\n').filter((line) => line.startsWith(name));
}

describe('the metrics', () => {
  test('have how long starts took, by the way to the virtual machine', async () => {
    const metrics = metricsOf();
    metrics.noteStart(started(['launcher', 1000], ['vm-restored', 1040], ['started', 1600]));
    metrics.noteStart(started(['launcher', 1000], ['vm-taken', 1010], ['started', 1090]));
    metrics.noteStart(started(['launcher', 1000], ['vmm-spawned', 1010], ['started', 4000]));
    expect(await samples(metrics, 'kiln_container_start_seconds_sum')).toEqual([
      'kiln_container_start_seconds_sum{way="template"} 0.6',
      'kiln_container_start_seconds_sum{way="pool"} 0.09',
      'kiln_container_start_seconds_sum{way="boot"} 3',
    ]);
  });

  test('leave a start out whose way or beginning nobody knows', async () => {
    const metrics = metricsOf();
    metrics.noteStart(started(['vm-restored', 1040], ['started', 1600]));
    metrics.noteStart(started(['launcher', 1000], ['started', 1600]));
    expect(await samples(metrics, 'kiln_container_start_seconds_count')).toEqual([]);
  });

  test('read the other figures when they are asked for', async () => {
    const pool = [shelf];
    const metrics = metricsOf({ pool });
    expect(await samples(metrics, 'kiln_containers ')).toEqual(['kiln_containers 3']);
    expect(await samples(metrics, 'kiln_template_events_total{')).toEqual([
      'kiln_template_events_total{event="restored"} 7',
      'kiln_template_events_total{event="restores_failed"} 1',
    ]);
    expect(await samples(metrics, 'kiln_firecracker_events_total{')).toEqual([
      'kiln_firecracker_events_total{event="vsock.conn_event_fails"} 4',
    ]);
    expect(await samples(metrics, 'kiln_pool_hits_total{')).toEqual(['kiln_pool_hits_total{template="k1"} 5']);
    pool.pop();
    expect(await samples(metrics, 'kiln_pool_hits_total{')).toEqual([]);
  });

  test('have those of the process', async () => {
    expect(await samples(metricsOf(), 'process_resident_memory_bytes ')).toHaveLength(1);
  });
});

describe('their server', () => {
  let folder: string;
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'kiln-metrics-'));
  });
  afterEach(() => rmSync(folder, { recursive: true }));

  /** On a Unix socket, so that no port of the machine is taken. */
  const socket = () => join(folder, 'metrics.sock');

  function ask(path: string, method = 'GET'): Promise<{ status: number | undefined; type: string; text: string }> {
    return new Promise((resolve, reject) => {
      const asked = request({ socketPath: socket(), path, method }, (response) => {
        text(response).then((body) => {
          resolve({ status: response.statusCode, type: response.headers['content-type'] ?? '', text: body });
        }, reject);
      });
      asked.on('error', reject);
      asked.end();
    });
  }

  test('answers GET /metrics and nothing else', async () => {
    await using _server = await serveMetrics(metricsOf(), { path: socket() });
    expect(await ask('/metrics')).toEqual({
      status: 200,
      type: expect.stringContaining('text/plain'),
      text: expect.stringContaining('kiln_containers 3\n'),
    });
    expect((await ask('/')).status).toBe(404);
    expect((await ask('/metrics', 'POST')).status).toBe(404);
  });

  test('tells what failed, and goes on', async () => {
    const broken = { contentType: 'text/plain', text: () => Promise.reject(new Error('no figures')) };
    await using _server = await serveMetrics(broken, { path: socket() });
    for (let twice = 0; twice < 2; twice += 1) {
      expect(await ask('/metrics')).toMatchObject({ status: 500, text: 'Error: no figures\n' });
    }
  });

  test('that finds its address in use says so', async () => {
    await using _first = await serveMetrics(metricsOf(), { path: socket() });
    await expect(serveMetrics(metricsOf(), { path: socket() })).rejects.toMatchObject({ code: 'EADDRINUSE' });
  });

  test.each([
    ['127.0.0.1:9464', { host: '127.0.0.1', port: 9464 }],
    ['localhost:1', { host: 'localhost', port: 1 }],
    ['[::1]:65535', { host: '::1', port: 65_535 }],
  ])('listens at %s as it says', (address, expected) => {
    expect(parseAddress(address)).toEqual(expected);
  });
});
