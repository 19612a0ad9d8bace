// Runs a task with what oapi-codegen made in client.go, and prints what came of it.
package main

import (
	"context"
	"encoding/json"
	"log"
	"net/http"
	"os"
	"time"
)

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func main() {
	url, token := os.Args[1], os.Args[2]
	ctx := context.Background()
	client := must(NewClientWithResponses(url, WithRequestEditorFn(
		func(_ context.Context, request *http.Request) error {
			request.Header.Set("Authorization", "Bearer "+token)
			return nil
		})))

	var first, second EnvVariables_AdditionalProperties
	must(0, first.FromEnvVariables0("from Go"))
	// What a float32 would lose.
	must(0, second.FromEnvVariables1(16777217))
	variables := EnvVariables{"MY_FIRST_PARAM": first, "MY_SECOND_PARAM": second}
	accepted := must(client.RunTaskWithResponse(ctx, nil, TaskRunnerRequest{
		TaskId:       "go",
		TaskFileName: "parameters.sh",
		WorkerConfig: WorkerConfig{EnvVariables: &variables},
	}))
	refused := must(client.RunTaskWithResponse(ctx, nil, TaskRunnerRequest{
		TaskId:       "refused",
		TaskFileName: "nothere.sh",
	}))
	for {
		task := must(client.GetTaskWithResponse(ctx, "go")).JSON200
		if task.Status == "succeeded" || task.Status == "failed" {
			output := must(client.GetTaskLogsWithResponse(ctx, "go", nil))
			must(0, json.NewEncoder(os.Stdout).Encode(map[string]any{
				"message":   accepted.JSON200.Message,
				"status":    task.Status,
				"exit_code": task.ExitCode,
				"log":       string(output.Body),
				"refused":   []any{refused.StatusCode(), refused.JSON404.Code},
			}))
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}
