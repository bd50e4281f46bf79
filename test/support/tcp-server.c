/*
 * For test/e2e/localhost.test.ts: a TCP server that runs a program for each connection, which is its stdin and stdout.
 *
 *   tcp-server ADDRESS PORT PROGRAM ARGUMENT...        "any": both IPv4 and IPv6
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int listener(const char *address, int port)
{
	const int on = 1;
	struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
	struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons((unsigned short)port)};
	int is_four = inet_pton(AF_INET, address, &four.sin_addr) == 1;
	if (!is_four && strcmp(address, "any") != 0 && inet_pton(AF_INET6, address, &six.sin6_addr) != 1)
		return -1;
	int fd = socket(is_four ? AF_INET : AF_INET6, SOCK_STREAM, 0);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	int bound = is_four ? bind(fd, (struct sockaddr *)&four, sizeof four)
			    : bind(fd, (struct sockaddr *)&six, sizeof six);
	return bound == 0 && listen(fd, 16) == 0 ? fd : -1;
}

int main(int count, char **arguments)
{
	int fd = count < 4 ? -1 : listener(arguments[1], atoi(arguments[2]));
	if (fd < 0) {
		perror("tcp-server");
		return 1;
	}
	signal(SIGCHLD, SIG_IGN);
	for (;;) {
		int connection = accept(fd, NULL, NULL);
		if (connection < 0)
			continue;
		if (fork() == 0) {
			dup2(connection, STDIN_FILENO);
			dup2(connection, STDOUT_FILENO);
			close(connection);
			close(fd);
			execvp(arguments[3], arguments + 3);
			_exit(127);
		}
		close(connection);
	}
}
