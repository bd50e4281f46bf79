/** What is made of the tree of commands: `--help`, manual pages and completions have all of it. */
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { treeOf } from '../../../src/cli/command-tree.ts';
import { completion, shells } from '../../../src/cli/completion.ts';
import { manPages } from '../../../src/cli/man-page.ts';
import { verbHelp } from '../../../src/cli/oci/help.ts';
import { groups, makeProgram } from '../../../src/cli/program.ts';

const program = makeProgram();
const tree = treeOf(program);
const pages = manPages(tree, { version: '1.2.3', help: verbHelp });

const has = (name: string) => spawnSync('which', [name]).status === 0;

describe('every verb', () => {
  it.each(tree.commands.map((node) => [node.name, node] as const))(
    '%s has help, a page and completions',
    (name, node) => {
      const command = program.commands.find((candidate) => candidate.name() === name);
      const page = pages.get(`kiln-${name}.1`) ?? '';
      expect(page).toContain(`.TH KILN\\-${name.toUpperCase()} 1 "" "kiln 1.2.3"`);
      expect(pages.get('kiln.1')).toContain(`\\fBkiln\\-${name}\\fR(1)`);
      for (const { long, description } of node.flags) {
        expect(description, `${name} --${long}`).not.toBe('');
        expect(page).toContain(`\\fB\\-\\-${long.replaceAll('-', '\\-')}\\fR`);
        for (const shell of shells) expect(completion(shell, tree), `${shell} ${long}`).toContain(long);
      }
      expect(command?.helpInformation()).toContain(`kiln ${name}`);
      for (const shell of shells) expect(completion(shell, tree)).toContain(name);
    },
  );

  it('of an OCI runtime has words and examples of its own, and there are no others', () => {
    const names = tree.commands.filter(({ heading }) => heading === groups.oci).map(({ name }) => name);
    expect(Object.keys(verbHelp).sort()).toEqual(['', ...names].sort());
  });
});

describe('pages', () => {
  it.runIf(has('groff'))('are free of errors and warnings', () => {
    for (const page of pages.values()) {
      const { stderr, stdout } = spawnSync('groff', ['-man', '-Tutf8', '-ww'], { input: page, encoding: 'utf8' });
      expect(stderr).toBe('');
      expect(stdout).toContain('kiln 1.2.3');
    }
  });

  it('say the same when they are made again', () => {
    expect(manPages(treeOf(makeProgram()), { version: '1.2.3', help: verbHelp })).toEqual(pages);
  });
});

describe('completion', () => {
  let dir: string;
  beforeAll(() => {
    dir = mkdtempSync(join(tmpdir(), 'kiln-completion-'));
    writeFileSync(join(dir, 'kiln'), '#!/bin/sh\necho "$*" >&2\nprintf "one\\ntwo\\n"\n', { mode: 0o755 });
    for (const shell of shells) writeFileSync(join(dir, `kiln.${shell}`), completion(shell, tree));
  });
  afterAll(() => rmSync(dir, { recursive: true, force: true }));

  /** What bash offers at the end of the line. */
  const bash = (...line: string[]) => {
    const script = `source ${dir}/kiln.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _kiln; printf '%s\\n' "\${COMPREPLY[@]}"`;
    const env = { ...process.env, PATH: `${dir}:${process.env.PATH}` };
    const output = execFileSync('bash', ['-c', script, 'bash', ...line], { env, encoding: 'utf8', stdio: 'pipe' });
    return output.split('\n').filter(Boolean);
  };

  it('of bash offers verbs, flags, ids and choices', () => {
    expect(bash('kiln', 'st')).toEqual(['start', 'state', 'status', 'stop']);
    expect(bash('kiln', '--root', '/x', 'st')).toEqual(['start', 'state', 'status', 'stop']);
    expect(bash('kiln', '--log-format', '')).toEqual(['text', 'json']);
    expect(bash('kiln', 'update', '--memory-')).toEqual(['--memory-reservation', '--memory-swap']);
    expect(bash('kiln', 'kill', '')).toEqual(['one', 'two']);
    expect(bash('kiln', 'kill', 'tw')).toEqual(['two']);
    expect(bash('kiln', 'create', '')).toEqual([]);
    expect(bash('kiln', 'completion', 'z')).toEqual(['zsh']);
  });

  it.runIf(has('zsh'))('of zsh is a script that zsh can read', () => {
    expect(spawnSync('zsh', ['-n', join(dir, 'kiln.zsh')], { encoding: 'utf8' }).stderr).toBe('');
  });

  it.runIf(has('fish'))('of fish is a script that fish can read, and offers verbs and ids', () => {
    const fish = (line: string) => {
      const env = { ...process.env, PATH: `${dir}:${process.env.PATH}`, HOME: dir };
      const script = `source ${dir}/kiln.fish; complete -C${JSON.stringify(line)}`;
      return spawnSync('fish', ['-N', '-c', script], { env, encoding: 'utf8' }).stdout;
    };
    expect(fish('kiln st')).toMatch(/^start\t/m);
    expect(fish('kiln kill ')).toMatch(/^one/m);
  });
});
