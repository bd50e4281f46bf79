import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { writeSpec } from '../../../../src/cli/oci/spec-command.ts';
import { parseSpec } from '../../../../src/oci/bundle.ts';
import { toGuestSpec } from '../../../../src/oci/guest-spec.ts';
import { runcBin } from '../../../support/paths.ts';
import { errorOf } from '../../oci/specs.ts';

describe('`kiln spec`', () => {
  let dir: string;
  let file: string;
  beforeEach(() => {
    dir = mkdtempSync(join(tmpdir(), 'kiln-spec-'));
    file = join(dir, 'config.json');
  });
  afterEach(() => rmSync(dir, { recursive: true, force: true }));

  it('writes what runc 1.1 writes, byte for byte, but for the hostname', () => {
    execFileSync(join(runcBin(), 'runc'), ['spec', '--bundle', dir]);
    // On a host with unified cgroups alone runc asks for a cgroup namespace, too, which every container has here.
    const runcs = readFileSync(file, 'utf8').replace('"hostname": "runc"', '"hostname": "kiln"');
    rmSync(file);
    writeSpec(file);
    expect(readFileSync(file, 'utf8')).toBe(runcs.replace(/,\n\t\t\t\{\n\t\t\t\t"type": "cgroup"\n\t\t\t\}/, ''));
  });

  it('writes what can be run as it is, without a warning', () => {
    writeSpec(file);
    const spec = parseSpec(readFileSync(file, 'utf8'), file);
    expect(toGuestSpec(spec, { id: 'c1', rootfsPath: '/run/rootfs' }).warnings).toEqual([]);
  });

  it('never overwrites, and says so in runc’s words', () => {
    writeFileSync(file, 'mine');
    expect(errorOf(() => writeSpec(file)).message).toBe('File config.json exists. Remove it first');
    expect(readFileSync(file, 'utf8')).toBe('mine');
  });

  it('names the file where the folder does not exist', () => {
    expect(errorOf(() => writeSpec(join(dir, 'none/config.json'))).message).toBe(
      `cannot write ${join(dir, 'none/config.json')}: ENOENT`,
    );
  });
});
